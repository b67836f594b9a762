"""How BAT-tiny is made, and the demo with it. It needs `examples/`, so it is no part of the installed package."""
