"""What the measures of a map are called in scores.csv and metrics.json, and which way is better."""

FIDELITIES = ("fidelity_plus", "fidelity_minus")
MEASURES = (*FIDELITIES, "insertion", "deletion")
SIGN_OF_BETTER = {"fidelity_plus": 1, "fidelity_minus": -1, "insertion": 1, "deletion": -1}
