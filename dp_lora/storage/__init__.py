"""Files, arrays and tensors on disk that are whole or not there."""
