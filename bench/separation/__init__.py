"""The experiments of the AutoClip paper (arXiv:2007.14469, sections 4 and 5): two speakers at once, five losses.

    corpora    voices or recorded mixtures at 8 kHz -> pairs of sources
    networks   the STFT, and a stacked BLSTM that gives embeddings, masks, or both
    losses     equations (4) to (8)
    train      one network, one loss, one percentile, one seed
    evaluate   outputs -> separated waveforms -> SI-SDR
    table      Table 1: losses x percentiles x seeds, resumable
    dynamics   Fig. 1: step size, loss, gradient norm and smoothness, with and without AutoClip
    plots      the pictures of both

`python -m bench.separation --help` from the repository root; README.md beside this file reads the results.
"""
