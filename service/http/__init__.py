"""The interface: requests in, answers out, and everything that the engine need not know."""
