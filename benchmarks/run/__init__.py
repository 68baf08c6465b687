"""Running experiments: what is run, its session with its folder, its evaluation."""
