"""PREDICTORS, one file each: who uses which adapter at inference, and which head answers."""

from cl_adapters.predictors.base import Prediction, Predictor, predictors

__all__ = ["Prediction", "Predictor", "predictors"]
