"""What existing clients say to a server, each as a script that gets its URL: in an environment of its own where it needs one.

The server serves a model with a chat template, and an adapter called story.
"""
