"""Settings of an encoder that is built in a moment and has blocks of both kinds."""

SMALL = {
    "img_size": 32,
    "patch_size": 4,
    "in_chans": 3,
    "time_dim": 2,
    "embed_dim": 16,
    "depth": 3,
    "n_spectral_blocks": 1,
    "num_heads": 2,
    "dp_rank": 2,
}
