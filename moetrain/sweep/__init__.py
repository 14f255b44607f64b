"""``moetrain train -m``: many runs of one command, chosen by a sampler, started by a launcher."""
