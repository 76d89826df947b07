"""The model and its batch: from a request's tokens to the next token of every row."""
