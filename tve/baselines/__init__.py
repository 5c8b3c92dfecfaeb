"""What TVE is compared with: other explanation methods, behind one interface (`tve.baselines.method`)."""
