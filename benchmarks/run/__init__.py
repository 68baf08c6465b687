"""Running experiments: what is run, its session, its folder, its evaluation."""
