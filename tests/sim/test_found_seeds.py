"""Seeds that once went wrong, each with what it found; they run in every test run."""

from __future__ import annotations

import pytest

from tests.sim.run import run, simulating

FOUND = {
    132156: "relayed, P is reborn while D stands still: the new life answered D's words with a cancel, and the client waited in vain",
    137892: "the same",
    206881: "the same, with two choices",
    191605: "relayed, the master loses D and cancels at P: D, which had said everything, waited for words on it for ever",
    221876: "the same",
    158383: "slow weather: a Submit that takes more than its second is an error of its own",
    20256: "a decode instance that was dead and not known to be gone was tried again, and counted as another loss",
    30920: "a half full block was copied for one choice and given to another request in the same step: with poison it was filled before it was copied",
    76305: "the same",
    178812: "the same",
    196382: "the same",
    1145485: "the same",
    1078089: "an instance that stood still counted as one that died, and an innocent request was quarantined",
    1080323: "the same",
    1201009: "the same",
    297950: "a second attempt was taken for begun because words of the first one were unread, and its Submit was withdrawn: the client waited in vain",
    1263993: "the same",
    1327689: "the giver's death was heard before what it had given: a landed request was let go of, and nobody said so",
    1099182: "relayed, the next attempt at the same P came before the cancel of the first: its D waited for words on it for ever",
    1148655: "the checks took a probe that fetches for a grant that is left, because it is counted at one side and asked for at the other",
    799: "the reply to a Submit was lost and its answer complete: a second attempt went on behind the end of it",
}


@pytest.mark.parametrize("seed", FOUND)
def test_a_seed_that_went_wrong_goes_right(seed: int) -> None:
    with simulating():
        run(seed)
