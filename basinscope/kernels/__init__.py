"""Arithmetic on tensors: noise, the SGLD update, cross-entropy. It knows no models or stores."""
