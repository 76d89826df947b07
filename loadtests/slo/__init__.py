"""The experiment on latency objectives: which share of requests meets them, and at which quality, by how ranks are chosen."""
