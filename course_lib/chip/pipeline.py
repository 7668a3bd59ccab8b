"""How long a matrix product takes in the pipelines of its cores: the longest of five paths through them.

For one tile of the result a core walks along k in stages, each what L1 holds of A and B; L1 has two halves. MTE2 loads a
stage, MTE1 extracts it to L0 step by step, the cube multiplies; at the tile's end FixPipe drains L0C, on which the cube
waits. All work beside each other, so what counts is what is waited for. After ``fill``, when the first stage has come:

    cube     first extraction + waves × products + drains between
    L1       waves × extractions + last product
    L2       loads of all other stages + what is done with the last one
    turn     every second stage: load + latency + extraction, for only then is its half of L1 free again
    memory   the first tiles of the result, then all that HBM has still to read and write

After each of the first four the last tile is drained. What a load takes depends on who was first to ask for the bytes
(see `sharing`). A core that is first waits for HBM, falls behind, and from then on finds in L2 what others have waited
for. So two cores are followed, that one and a usual one; the later of the two ends the product.
"""

from dataclasses import dataclass

from course_lib.chip.core.rules import THOUSANDTHS, Rules
from course_lib.chip.sharing import Sharing


@dataclass(slots=True)
class Walk:
    """One tile: bytes of A and B, stages along k, and what MTE1 (``extract``) and cube take for a step, in cycles."""

    a: int
    b: int
    stages: int
    part: float  # share of k in one stage
    steps: int  # in a stage
    before: int  # whole steps of the last stage, before its last step, which may be shallower
    extract: int
    cube: int
    last_extract: int
    last_cube: int
    drain: int

    @property
    def whole(self) -> int:
        """Steps of full depth, in all."""
        return (self.stages - 1) * self.steps + self.before

    def finish(self) -> int:
        """From when the last stage is in L1 to the end of the last product."""
        first = self.extract if self.before else self.last_extract
        return max(self.before * self.extract + self.last_extract, first + self.before * self.cube) + self.last_cube

    def hold(self) -> int:
        """How long MTE1 needs a stage in L1. It is two steps ahead of the cube at most, for L0 has two halves too."""
        if self.stages > 1:
            return max(self.steps * self.extract, 2 * self.extract + (self.steps - 2) * self.cube)
        slowed = self.extract + self.last_extract + (self.before - 1) * self.cube if self.before else 0
        return max(self.before * self.extract + self.last_extract, slowed)


@dataclass(slots=True)
class Pipeline:
    """A product on a chip: its tiles as walks, how many waves of them, and who shares what."""

    how: Rules
    walk: Walk
    waves: int
    shared: Sharing
    later_tiles: int  # those after the first wave
    out: int  # bytes of the result
    short: Walk | None  # the tile of the last row, where it has fewer rows and is in the first wave
    rest: float  # share of a whole tile's rows that are in it
    next_b: float  # width of the second column's tile over that of the first

    def longest(self) -> tuple[float, str]:
        """(cycles of the longest path, its name: "cube", "L1", "L2", "turn" or "memory")."""
        walk, shared = self.walk, self.shared
        near = self.how.latency["to_l1"]
        lead = self.fill()
        usual = walk.a / shared.wide + walk.b * shared.new / shared.high  # bytes of a tile that are missed in the first wave
        alone = sum(
            amount * (-(-walk.stages // sharers) - 1) / max(1, walk.stages - 1)  # the leader's, after its first stage
            for amount, sharers in ((walk.a, shared.wide), (walk.b * shared.new, shared.high))
        )
        later = sum(min(whole, left / self.later_tiles) * new for whole, left, new in
                    ((walk.a, shared.later[0], 1), (walk.b, shared.later[1], shared.new)))  # fmt: skip
        load, again = self.load(1, usual), self.load(1, later)
        ends = self.paths(self.waves, walk.part * load + near, load, again)
        ahead = self.paths(self.waves, lead, self.load(1, alone), self.caught_up(lead, alone, usual, later))
        found = {name: max(end, ahead[name]) + walk.drain for name, end in ends.items()}
        found["memory"] = self.first_tiles(load) + self.hbm(sum(shared.later), self.out)
        bound = max(found, key=found.get)
        return found[bound], bound

    def paths(self, waves: int, fill: float, load: float, again: float) -> dict[str, float]:
        """Cycles to the end of the last product; ``load`` of a tile in the first wave, ``again`` in a later one."""
        walk = self.walk
        whole, stages, finish, hold = walk.whole, walk.stages * waves, walk.finish(), walk.hold()
        found = {
            "cube": fill + walk.extract + waves * (whole * walk.cube + walk.last_cube) + (waves - 1) * walk.drain,
            "L1": fill + waves * (whole * walk.extract + walk.last_extract) + walk.last_cube,
            "L2": fill + (1 - walk.part) * load + (waves - 1) * again + finish,
        }
        if stages > 1:
            stage = walk.part * (again if waves > 1 else load)
            turns = (stages - 1) // 2 * (stage + self.how.latency["to_l1"] + hold)
            odd = 0 if stages % 2 else hold if stages == 2 else max(stage, hold)
            found["turn"] = fill + turns + odd + finish
        return found

    # -- loads --------------------------------------------------------------------------------------

    def load(self, part: float, missed: float) -> float:
        """Cycles of a core's port for ``part`` of a tile's A and B, of which it misses some bytes in L2."""
        return (part * (self.walk.a + self.walk.b) - missed) / self.how.l2_read + missed / self.how.gm_read

    def hbm(self, read: float, written: float = 0) -> float:
        """Cycles that HBM, shared by all cores, is taken."""
        return self.how.hbm(int(read), int(written)) / THOUSANDTHS

    def fill(self) -> float:
        """Until the slowest core has its first stage.

        The cores of the first column wait for A; one of them is first to ask for B too. Where the last row is short, its
        core comes to B first and has less to do afterwards. Where tiles share sectors, the second column is there before.
        """
        how, walk, shared = self.how, self.walk, self.shared
        near, far = how.latency["to_l1"], how.latency["to_l1"] + how.latency["l2_miss"]
        slow_a, fast_a, slow_b, fast_b = (
            walk.part * amount / width for amount in (walk.a, walk.b) for width in (how.gm_read, how.l2_read)
        )
        second = slow_a if shared.wide == 1 else fast_a  # stage of A
        rest, spared, queue = 1, 0, 0
        if self.short and (walk.stages == 1 or self.rest * (slow_a + second) + slow_b <= slow_a + fast_b + second):
            rest, queue = self.rest, self.hbm(walk.part * shared.first[0])
            spared = walk.finish() + walk.drain - self.short.finish() - self.short.drain
        b_missed = max(rest * slow_a, queue) + shared.sole * slow_b + (1 - shared.sole) * fast_b + far - spared
        fill = max(slow_a + max(far, fast_b + near), b_missed)
        if shared.sole < 1 and shared.wide > 1:
            fill = max(fill, max(rest * fast_a, queue) + self.next_b * slow_b + far - spared)
        return max(fill, self.hbm(walk.part * sum(shared.first)) + far)

    def caught_up(self, lead: float, alone: float, usual: float, later: float) -> float:
        """Load of a later tile by the core that led: it finds in L2 what others, now ahead of it, have missed."""
        how, walk = self.how, self.walk
        again = self.load(1, later)
        if min(self.shared.high, self.shared.wide) == 1:  # nobody is there before it
            return again
        dear = 1 / how.gm_read - 1 / how.l2_read  # cycles per byte missed
        waited = lead - how.latency["to_l1"] - how.latency["l2_miss"] - self.load(walk.part, 0)
        waited = max(0, waited) + ((1 - walk.part) * alone - usual) * dear  # beyond what is usual
        return max(self.load(1, 0), again - max(0, waited) / max(1, self.waves - 1))

    def first_tiles(self, load: float) -> float:
        """When results start to flow to HBM: a core that waits for nobody has its first tile."""
        how, walk, shared = self.how, self.walk, self.shared
        own = walk.part * ((walk.a if shared.wide == 1 else 0) + (walk.b * shared.new if shared.high == 1 else 0))
        fill = self.load(walk.part, own) + how.latency["to_l1"] + (how.latency["l2_miss"] if own else 0)
        read = self.hbm(sum(shared.first)) + how.latency["to_l1"] + walk.finish()
        return max(read, *self.paths(1, fill, load, 0).values())
