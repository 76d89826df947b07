"""Stories against a real `dylora serve` process."""
