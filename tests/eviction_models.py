"""Eviction policies as their papers have them, in lists that are searched from end to end."""

from __future__ import annotations

import copy
import functools
import math

from kvkernels.memory.eviction.density import BUCKETS, EDGES, hit_densities


class Model:
    """Keys that are held, and which of them may leave; ``evict`` is what a policy does by victims and evicted."""

    def __init__(self, capacity, clock):
        self.capacity, self.clock = capacity, clock
        self.blocked = set()
        self.keys = []

    def missed(self, key):
        pass

    def victims(self, n, protected=()):
        if len([key for key in self.keys if key not in self.blocked and key not in protected]) < n:
            return None
        return copy.deepcopy(self).evict(n, protected)

    def evict(self, n, protected=()):
        found = []
        for _ in range(n):
            key = self.choose([key for key in self.keys if key not in self.blocked and key not in protected])
            self.ghost(key)
            self.remove(key)
            found.append(key)
        return found

    def ghost(self, key):
        """It leaves, but has not yet."""

    def leave(self, keys):
        for key in keys:
            self.ghost(key)
            self.remove(key)

    def insert(self, key, priority=0, ttl=None, context=None):
        self.keys.append(key)

    def touch(self, key, context=None):
        pass

    def remove(self, key):
        self.keys.remove(key)
        self.blocked.discard(key)

    def set_evictable(self, key, evictable):
        (self.blocked.discard if evictable else self.blocked.add)(key)


class FIFO(Model):
    def choose(self, keys):
        return keys[0]


class LRU(FIFO):
    def touch(self, key, context=None):
        self.keys.remove(key)
        self.keys.append(key)


class LFU(LRU):
    def __init__(self, *args):
        super().__init__(*args)
        self.uses = {}

    def insert(self, key, **more):
        super().insert(key)
        self.uses[key] = 1

    def touch(self, key, context=None):
        super().touch(key)
        self.uses[key] += 1

    def choose(self, keys):
        return min(keys, key=self.uses.__getitem__)


class Priority(LRU):
    def __init__(self, *args):
        super().__init__(*args)
        self.priority = {}

    def insert(self, key, priority=0, **more):
        super().insert(key)
        self.priority[key] = priority

    def choose(self, keys):
        return min(keys, key=self.priority.__getitem__)


class TTL(LRU):
    def __init__(self, *args):
        super().__init__(*args)
        self.ttl, self.end = {}, {}

    def insert(self, key, ttl=None, **more):
        super().insert(key)
        self.ttl[key] = math.inf if ttl is None else ttl
        self.end[key] = self.clock() + self.ttl[key]

    def touch(self, key, context=None):
        super().touch(key)
        self.end[key] = self.clock() + self.ttl[key]

    def choose(self, keys):
        return min(keys, key=self.end.__getitem__)


class ARC(Model):
    """Figure 4 of the paper, in the order in which its owner asks; oldest first in each list."""

    def __init__(self, *args):
        super().__init__(*args)
        self.t1, self.t2, self.b1, self.b2 = [], [], [], []
        self.p = 0
        self.asked = None

    def missed(self, key):
        self.asked = key
        if key in self.b1:
            self.p = min(self.capacity, self.p + max(len(self.b2) / len(self.b1), 1))
        elif key in self.b2:
            self.p = max(0, self.p - max(len(self.b1) / len(self.b2), 1))

    def choose(self, keys):
        may_leave = set(keys)
        once, again = [key for key in self.t1 if key in may_leave], [key for key in self.t2 if key in may_leave]
        size = len(self.t1)
        from_t1 = size >= 1 and ((self.asked in self.b2 and size == self.p) or size > self.p)
        return once[0] if once and (from_t1 or not again) else again[0]

    def ghost(self, key):
        if key in self.t2:
            self.b2.append(key)
        elif len(self.t1) < self.capacity or self.asked in self.b2:
            self.b1.append(key)

    def insert(self, key, **more):
        super().insert(key)
        self.asked = None
        if key in self.b1 + self.b2:
            (self.b1 if key in self.b1 else self.b2).remove(key)
            self.t2.append(key)
            return
        if len(self.t1) + len(self.b1) >= self.capacity:
            del self.b1[:1]
        elif len(self.t1 + self.t2 + self.b1 + self.b2) >= 2 * self.capacity:
            del self.b2[:1]
        self.t1.append(key)

    def touch(self, key, context=None):
        (self.t1 if key in self.t1 else self.t2).remove(key)
        self.t2.append(key)

    def remove(self, key):
        super().remove(key)
        (self.t1 if key in self.t1 else self.t2).remove(key)


class S3FIFO(Model):
    """Algorithm 1 of the paper; oldest first in each list."""

    def __init__(self, *args):
        super().__init__(*args)
        self.small, self.main, self.ghosts = [], [], []
        self.freq, self.aside = {}, {}
        self.small_limit = max(1, self.capacity // 10)
        self.main_limit = self.capacity - self.small_limit

    def insert(self, key, **more):
        super().insert(key)
        self.freq[key] = 0
        if key in self.ghosts:
            self.ghosts.remove(key)
            self.main.append(key)
        else:
            self.small.append(key)

    def touch(self, key, context=None):
        self.freq[key] = min(3, self.freq[key] + 1)

    def evict(self, n, protected=()):
        waiting = []
        found = [self.evict_one(protected, waiting) for _ in range(n)]
        for key, queue in reversed(waiting):
            queue.insert(0, key)
        return found

    def evict_one(self, protected, waiting):
        while True:
            from_small = len(self.small) >= self.small_limit or not self.main
            key = (self.evict_small if from_small else self.evict_main)(protected, waiting)
            if key is not None:
                return key

    def is_away(self, key, queue, protected, waiting):
        if key in self.blocked:
            self.aside[key] = queue
        elif key in protected:
            waiting.append((key, queue))
        return key in self.blocked or key in protected

    def evict_small(self, protected, waiting):
        while self.small:
            key = self.small.pop(0)
            if self.is_away(key, self.small, protected, waiting):
                continue
            if self.freq[key] > 1:
                self.freq[key] = 0
                self.main.append(key)
                if len(self.main) > self.main_limit:
                    break
            else:
                self.add_ghost(key)
                self.keys.remove(key)
                return key
        return self.evict_main(protected, waiting)

    def evict_main(self, protected, waiting):
        while self.main:
            key = self.main.pop(0)
            if self.is_away(key, self.main, protected, waiting):
                continue
            if self.freq[key] > 0:
                self.freq[key] -= 1
                self.main.append(key)
            else:
                self.keys.remove(key)
                return key
        return None

    def add_ghost(self, key):
        self.ghosts.append(key)
        del self.ghosts[: max(0, len(self.ghosts) - self.main_limit)]

    def ghost(self, key):
        if key in self.small or self.aside.get(key) is self.small:
            self.add_ghost(key)

    def remove(self, key):
        super().remove(key)
        for queue in (self.small, self.main):
            if key in queue:
                queue.remove(key)
        self.aside.pop(key, None)

    def set_evictable(self, key, evictable):
        super().set_evictable(key, evictable)
        if evictable and key in self.aside:
            self.aside.pop(key).insert(0, key)


class SIEVE(Model):
    """Algorithm 1 of the paper; newest first, and the hand is a key, or None for the oldest."""

    def __init__(self, *args):
        super().__init__(*args)
        self.queue, self.visited, self.hand, self.aside = [], {}, None, set()

    def insert(self, key, **more):
        super().insert(key)
        self.queue.insert(0, key)
        self.visited[key] = False

    def touch(self, key, context=None):
        self.visited[key] = True

    def newer(self, key):
        at = self.queue.index(key)
        return self.queue[at - 1] if at else None

    def take_out(self, key):
        if self.hand == key:
            self.hand = self.newer(key)
        self.queue.remove(key)

    def put_at_hand(self, key):
        at = len(self.queue) if self.hand is None else self.queue.index(self.hand) + 1
        self.queue.insert(at, key)
        self.hand = key

    def evict(self, n, protected=()):
        found, waiting = [], []
        while len(found) < n:
            key = self.hand = self.queue[-1] if self.hand is None else self.hand
            if key in self.blocked or key in protected:
                self.take_out(key)
                self.aside.add(key) if key in self.blocked else waiting.append(key)
            elif self.visited[key]:
                self.visited[key] = False
                self.hand = self.newer(key)
            else:
                self.take_out(key)
                self.keys.remove(key)
                found.append(key)
        for key in reversed(waiting):
            self.put_at_hand(key)
        return found

    def remove(self, key):
        super().remove(key)
        if key in self.queue:
            self.take_out(key)
        self.aside.discard(key)

    def set_evictable(self, key, evictable):
        super().set_evictable(key, evictable)
        if evictable and key in self.aside:
            self.aside.remove(key)
            self.put_at_hand(key)


@functools.cache
def bucket_of_age(age):
    return max(bucket for bucket in range(BUCKETS) if EDGES[bucket] <= age)


class Chain(Model):
    """Each key with its class, its request and its place; everything is counted anew when it is needed."""

    def __init__(self, *args):
        super().__init__(*args)
        self.of, self.ghosts = {}, {}
        self.now = self.aged_at = self.learned_at = self.start = 0
        self.depth, self.last = -1, None
        self.unit = max(1, self.capacity // 32)
        self.learn_uses = max(500, self.capacity // 4)
        self.fade = math.exp(-self.learn_uses / (8 * self.capacity))
        self.gaps, self.again, self.gone = [0.0] * BUCKETS, [0.0] * 8, [0.0] * 8
        self.worth = [[1 / (1 + bucket) for bucket in range(BUCKETS)]] * 8

    def bucket(self, start, now):
        return bucket_of_age(max(0, now - start) // self.unit)

    def follow(self, context):
        depth = self.depth + 1 if context is None else context.depth
        if depth != self.depth + 1 or (context is None and self.now - self.start >= self.unit):
            if context is not None and self.last in self.of:
                kind, start, place = self.of[self.last]
                self.of[self.last] = (kind + 1, start, place)
            self.start, self.last = self.now, None
            if self.now - self.aged_at >= self.unit:
                self.aged_at = self.now
            if self.now - self.learned_at >= self.learn_uses:
                self.learn()
        self.depth = depth
        self.now += 1

    def learn(self):
        self.learned_at = self.now
        if not any(self.gaps):
            return
        total = sum(self.gaps)
        left = [sum(self.gaps[bucket:]) / total for bucket in range(BUCKETS + 1)]
        watched = [again + gone for again, gone in zip(self.again, self.gone, strict=True)]
        for kind, start, *_ in [*self.of.values(), *self.ghosts.values()]:
            watched[kind] += 1 - left[self.bucket(start, self.now)]
        self.worth = [hit_densities(left, again, all_) for again, all_ in zip(self.again, watched, strict=True)]
        for counts in (self.gaps, self.again, self.gone):
            counts[:] = [count * self.fade for count in counts]

    def used(self, key, before, at):
        kind, start, _ = before
        self.again[kind] += 1
        self.gaps[self.bucket(start, at)] += 1
        self.of[key] = (min(6, kind // 2 * 2 + 2), self.start, self.now)
        self.last = key

    def insert(self, key, context=None, **more):
        super().insert(key)
        self.follow(context)
        if key in self.ghosts:
            self.used(key, self.ghosts.pop(key), self.now)
        else:
            self.of[key] = (0, self.start, self.now)
            self.last = key

    def touch(self, key, context=None):
        self.follow(context)
        self.used(key, self.of[key], self.aged_at)

    def choose(self, keys):
        def order(key):
            kind, start, place = self.of[key]
            bucket = self.bucket(start, self.aged_at)
            return (self.worth[kind][bucket], -bucket, kind, start, -place)

        return min(keys, key=order)

    def ghost(self, key):
        self.ghosts[key] = self.of[key]
        if len(self.ghosts) > 8 * self.capacity:
            kind, *_ = self.ghosts.pop(next(iter(self.ghosts)))
            self.gone[kind] += 1

    def remove(self, key):
        super().remove(key)
        del self.of[key]


MODELS = {"lru": LRU, "lfu": LFU, "fifo": FIFO, "ttl": TTL, "priority": Priority, "arc": ARC, "s3fifo": S3FIFO,
          "sieve": SIEVE, "chain": Chain}  # fmt: skip
