"""The public ops, one module per family: checks, schema, and the function that users call."""
