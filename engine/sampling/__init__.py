"""Choosing the next token, statelessly: randomness is a function of (seed, position, token id)."""
