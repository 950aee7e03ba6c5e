"""Search for the values of a merge recipe. Start at `evolve.loop.run`."""
