"""The HTTP gateway: OpenAI's endpoints in front of an `LLM` or a `Client`.

Needs the extra `http`. Importing `treadle` never imports this package, and importing this package alone imports
nothing of the extra: `check_extra` (in `extra.py`) says what is missing, and how to get it.
"""
