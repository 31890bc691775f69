"""What the measurements in docs/ are made with."""
