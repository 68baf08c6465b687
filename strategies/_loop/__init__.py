"""What Avalanche's loop needs and no paper mentions: order of samples, cached activations, experiences."""
