"""Structured output: which tokens a grammar allows next, for each guided row of each step.

docs/structured-output.md tells the user's side, docs/decisions/012-guided-masks.md why it is done so.

`pending` knows when a step's masks can be made (a part of the core, without I/O), `matching` what a matcher is,
`llg` makes matchers by llguidance (`spelling` says to it what bytes the tokens are, `multiples` keeps schemas from it
that are too costly), `rows` keeps one for each sequence. `guide` runs all that beside the loop, with the threads of
`compilers` and the grammars in `cache`, and `desk` is where the service leaves its guided requests.
"""
