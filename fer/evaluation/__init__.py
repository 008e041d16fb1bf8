"""What a trained network is worth: its answers on a test part, and everything measured on them."""
