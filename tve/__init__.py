"""TVE, the Transferable Vision Explainer: any classifier, any task, one forward pass."""
