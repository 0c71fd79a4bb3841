"""prw_flux: CoLoGen on FLUX.1, built on prw."""
