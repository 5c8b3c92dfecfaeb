"""How faithful a map is to the model: fidelity under removal, controls, intervals."""
