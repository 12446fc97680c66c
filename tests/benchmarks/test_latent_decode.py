"""A compiled decode step on the CPU touches the array of all pages twice: a write in place, a read of live blocks."""

import jax

from benchmarks.latent_decode import SHAPE, compiled_step, paged_step, touching

PAGES = (SHAPE.pages, SHAPE.page, SHAPE.latent + SHAPE.rope)
WHOLE = f"f32[{','.join(map(str, PAGES))}]"
BLOCK = f"f32[256,{PAGES[2]}]"


def test_the_step_writes_in_place_and_reads_only_blocks():
    compiled = compiled_step(SHAPE.pages, SHAPE.table)
    assert touching(compiled.as_text(), PAGES) == {f"fusion -> {WHOLE}": 1, f"fusion -> {BLOCK}": 1}
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == 4 * PAGES[0] * PAGES[1] * PAGES[2]
    assert memory.temp_size_in_bytes < 0.01 * memory.alias_size_in_bytes


def test_a_copy_of_the_cache_is_seen():
    q, pages, *rest = SHAPE.arrays()
    kept = jax.jit(paged_step).lower(pages, q, *rest).compile()  # not donated: the caller keeps the old pages
    assert touching(kept.as_text(), PAGES)[f"copy -> {WHOLE}"] == 1
