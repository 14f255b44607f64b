"""What a mapping will need, said before anything is launched."""
