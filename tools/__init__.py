"""Tools around BAT that a Hub snapshot does not need."""
