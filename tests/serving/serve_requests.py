"""Thousands of requests in an engine, and which of their tokens are not those of a run alone."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field

KEPT = 20  # logits of a token that are compared
SAMPLING = {"temperature": 0, "ignore_eos": True, "detokenize": False, "logprobs": KEPT}


@dataclass
class Comparison:
    """How far the logits of requests in a crowd are from those of each alone.

    A token that differs is not judged by how near the two best were, since a wrong kernel moves
    logits as well, but by how far logits moved from the one run to the other, there and at every
    other token, of those that follow the same tokens.
    """

    tokens: int = 0
    changes: list[float] = field(default_factory=list)  # the largest of each token
    unlike: int = 0  # tokens of which not all is equal to the bit
    shortest: int | None = None  # what was before the one of them with the least before it
    flips: list[dict] = field(default_factory=list)

    def add(self, name: str, length: int, crowd, alone) -> None:
        """Compare one request.

        Args:
            length: of the prompt.
            crowd, alone: token_ids, and logprobs, a dict of the best logits of each token.
        """
        runs = zip(crowd.token_ids, alone.token_ids, crowd.logprobs, alone.logprobs, strict=True)
        for at, (token, other, *entries) in enumerate(runs):
            one, two = ({t: entry.logprob for t, entry in found.items()} for found in entries)
            both = one.keys() & two.keys()
            change = max((abs(one[t] - two[t]) for t in both), default=float("inf"))
            # The best of one run that is none of the best of the other: it is below all of them.
            if other not in one:
                change = max(change, two[other] - min(one.values()))
            if token not in two:
                change = max(change, one[token] - min(two.values()))
            self.tokens += 1
            if token != other or one != two:
                self.unlike += 1
                self.shortest = min(length + at, self.shortest or length + at)
            self.changes.append(change)
            if token != other:
                best = [sorted(run.items(), key=lambda pair: -pair[1])[:2] for run in (one, two)]
                self.flips.append({"request": name, "at": at, "best": best, "change": change})
                break  # what follows has another past

    def spread(self) -> dict[float, float]:
        """The changes by share of tokens."""
        ordered = sorted(self.changes)
        last = len(ordered) - 1
        return {q: ordered[min(int(q * len(ordered)), last)] for q in (0.5, 0.9, 0.99, 1.0)}


def requests(check, llm, bound: float | None, compare: bool = True) -> None:
    """Requests of mixed lengths, some aborted; some of them again, alone.

    Args:
        bound: what a logit may move by; None where all has to be equal to the bit.
        compare: whether to.
    """
    import vllm

    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    asked = []
    numbers = random.Random(2)
    prompts, wishes, aborted, finished, pending = {}, {}, set(), {}, []
    shared = [numbers.randrange(3, check.vocabulary) for _ in range(160)]  # for the prefix cache
    for i in range(check.options.requests):
        own = [numbers.randrange(3, check.vocabulary) for _ in range(numbers.randint(1, 400))]
        prompts[str(i)] = shared[: numbers.choice((0, 64, 160))] + own
        wishes[str(i)] = numbers.randint(1, 48)
        pending.append(str(i))
    check.served(llm)  # so that what is allocated once is there
    engine.reset_prefix_cache()
    before = pool.get_num_free_blocks(), check.allocated()
    running: set[str] = set()
    start = time.perf_counter()
    while pending or running:
        while pending and len(running) < 96:
            name = pending.pop()
            params = vllm.SamplingParams(max_tokens=wishes[name], **SAMPLING)
            engine.add_request(name, {"prompt_token_ids": prompts[name]}, params)
            asked.append(next(reversed(scheduler.requests.values())))
            running.add(name)
        if running and numbers.random() < 0.05:
            victim = numbers.choice(sorted(running))
            engine.abort_request([victim])
            running.discard(victim)
            aborted.add(victim)
        for output in engine.step():
            if output.finished and output.request_id in running:
                finished[output.request_id] = output
                running.discard(output.request_id)
        if time.monotonic() > check.options.deadline:
            engine.abort_request(sorted(running))
            aborted |= running
            check.note("not run", f"{len(pending)} requests: the budget has ended")
            break
    for _ in range(3):
        engine.step()
    took = time.perf_counter() - start
    tokens = sum(len(output.outputs[0].token_ids) for output in finished.values())
    check.note("finished", len(finished))
    check.note("aborted", len(aborted))
    check.note("tokens_per_s", round(tokens / took))
    check.note("preempted", sum(request.num_preemptions > 0 for request in asked))
    check.note("from the prefix cache", sum(o.num_cached_tokens > 0 for o in finished.values()))
    wrong = [n for n, o in finished.items() if len(o.outputs[0].token_ids) != wishes[n]]
    check.require(not wrong, f"each has as many tokens as it asked for; others: {wrong[:5]}")
    engine.reset_prefix_cache()
    after = pool.get_num_free_blocks(), check.allocated()
    check.require(after[0] == before[0], f"free KV blocks: {before[0]} before, {after[0]} after")
    grown = after[1] - before[1]
    check.require(grown < 16 << 20, f"memory: {grown} bytes more than before")
    if not compare:
        return
    found = Comparison()
    for name in sorted(finished)[: check.options.compare]:
        params = vllm.SamplingParams(max_tokens=wishes[name], **SAMPLING)
        engine.reset_prefix_cache()
        (alone,) = llm.generate([{"prompt_token_ids": prompts[name]}], params, use_tqdm=False)
        found.add(name, len(prompts[name]), finished[name].outputs[0], alone.outputs[0])
    check.require(found.tokens > 0, "some were compared with a run alone")
    check.note("tokens_compared", found.tokens)
    check.note("tokens of which a logit is not equal to the bit", found.unlike)
    check.note("the least context of one of them", found.shortest)
    check.note("largest change of a logit, by share of tokens", found.spread())
    check.note("flips", found.flips)
    if bound is None:
        check.require(not found.unlike, "tokens and logits are those of a run alone, to the bit")
    else:
        most = max(found.changes)
        check.require(
            most < bound,
            f"no logit moves as far as quantization moves one (RMS, {bound:.3f}): {most:.3f}",
        )
