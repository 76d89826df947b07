"""The library's commands: each a dataclass of options, and a function of the same name that takes them in Python."""
