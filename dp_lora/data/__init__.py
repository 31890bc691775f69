"""Image sets: where they are read from, how they are prepared, which role an image has."""
