"""FLOPs and bytes of a decoder's tokens, by its configuration."""

from __future__ import annotations

import pytest

from complete_fn.capacity.decoder_work import DecoderWork
from tests.model_configs import LLAMA


def test_the_shape_counts_a_layer_by_its_matrices() -> None:
    decoder = DecoderWork.of(LLAMA)
    layer = 4 * 64 * 64 + 4 * 64 * 32 + 6 * 64 * 128
    assert decoder.prompt == 8 * layer
    assert decoder.output == 8 * layer + 2 * 64 * 1000
    assert (decoder.attend_prompt, decoder.attend_output, decoder.kv) == (4 * 64 * 8, 4 * 64 * 8, 2 * 32 * 8 * 2)
    assert decoder.weights == decoder.output  # 2 FLOPs and 2 bytes a weight


def test_work_of_a_prompt_in_chunks_is_that_of_the_whole() -> None:
    decoder = DecoderWork.of(LLAMA)
    whole, _ = decoder.work(0, 100, 100)
    parts = [decoder.work(a, b, 100) for a, b in ((0, 30), (30, 90), (90, 100))]
    assert sum(flops for flops, _ in parts) == pytest.approx(whole)
    assert decoder.work(32, 100, 100)[0] < whole  # what was cached is not computed
    assert decoder.work(100, 101, 100) == (decoder.output + 101 * decoder.attend_output, 101 * decoder.kv)
