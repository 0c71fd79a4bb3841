"""Encoded training samples on disk, so that training needs no autoencoder and no text encoder.

    CACHE/samples/<stage>-<digest>/table.json   what decides the samples of a stage
    CACHE/samples/<stage>_held_out-<digest>/    the same of those that it never trains on
    CACHE/samples/<stage>-<digest>/00000.safetensors ...   which contents 256 samples are made of
    CACHE/shards/<stage>-<digest>-00000.latents.safetensors ...   the contents: latents and texts

A content (the pixels of one picture, one text) is named by its hash and that of its encoder, and is
stored once, whichever samples share it. Files are put in place whole; a block of samples after its
shards. `build` makes a cache, `check` looks at it again, `Table` is what training reads.
"""
