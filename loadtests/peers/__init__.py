"""Workers that run in an interpreter of their own, which has the engine that they drive and nothing of this project."""
