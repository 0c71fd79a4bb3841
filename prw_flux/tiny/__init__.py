"""tiny-flux: the embedded FLUX-layout pipeline, and the commands that build it."""
