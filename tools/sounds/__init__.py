"""Reading sounds and the lists that name them, for every command."""
