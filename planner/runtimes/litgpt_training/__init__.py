"""Training steps of lit-gpt as programs: its forward line by line, and the way back."""
