"""What a run will take, from its configuration alone: work, memory, disk, hours, cost.

`architecture` reads the shapes of the base, `work` counts operations, `memory` bytes, `plan` puts
them together per stage. Nothing is loaded: models are made on the meta device, where a tensor has a
shape and no memory.
"""
