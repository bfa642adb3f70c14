"""The memory of a run, before it is started; and advice where memory runs out."""
