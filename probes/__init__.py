"""Probes in scikit-learn's estimator API, with splits, selection and nulls that keep one honest."""
