"""Interventions and the sweeps that test findings causally."""
