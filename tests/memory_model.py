"""A slow and obvious prefix cache with LRU, which the real one is compared with after each operation."""

from __future__ import annotations


class TooFew(Exception):
    pass


class Model:
    """Everything is a list or a dict, and every question is answered by looking at all blocks.

    ``blocks`` has a row for each cached block, the least recently used first: [hash, block, parent, users].
    """

    def __init__(self, cap: int | None) -> None:
        self.cap = cap
        self.blocks: list[list] = []
        self.draining: list[list] = []
        self.reserved = 0

    # Questions.

    def row(self, key):
        return next((row for row in self.blocks if row[0] == key), None)

    def chain(self, hashes):
        found = []
        for key in hashes:
            if self.row(key) is None:
                break
            found.append(key)
        return found

    def has_child(self, key):
        return any(row[2] == key for row in self.blocks)

    def in_custody(self):
        return len(self.blocks) + len(self.draining) + self.reserved

    def below(self, key):
        """A block and all behind it."""
        return [key] + [one for row in self.blocks if row[2] == key for one in self.below(row[0])]

    def num_evictable(self):
        return sum(all(self.row(one)[3] == 0 for one in self.below(row[0])) for row in self.blocks)

    def next_victim(self, besides=None):
        free = [r for r in self.blocks if r[3] == 0 and not self.has_child(r[0]) and r[0] != besides]
        return free[0] if free else None

    # Changes.

    def lookup(self, hashes, hold):
        found = self.chain(hashes)
        for key in found:
            row = self.row(key)
            self.blocks.remove(row)
            self.blocks.append(row)
            row[3] += hold
        return [self.row(key)[1] for key in found]

    def unuse(self, key):
        row = self.row(key)
        if row is not None:
            row[3] -= 1
            return []
        row = next(row for row in self.draining if row[0] == key)
        row[3] -= 1
        if row[3]:
            return []
        self.draining.remove(row)
        return [(row[0], row[1])]

    def evict(self, count):
        if count > self.num_evictable():
            raise TooFew
        gone = []
        for _ in range(count):
            row = self.next_victim()
            self.blocks.remove(row)
            gone.append((row[0], row[1]))
        return gone

    def insert(self, hashes, blocks, parent):
        back = []
        for i, (key, block) in enumerate(zip(hashes, blocks, strict=True)):
            row = self.row(key)
            if row is not None:
                if row[1] != block:
                    back.append((key, block))
            else:
                if any(row[0] == key for row in self.draining):
                    return back + list(zip(hashes[i:], blocks[i:], strict=True))
                if self.cap is not None and self.in_custody() >= self.cap:
                    row = self.next_victim(besides=parent)
                    if row is None:
                        return back + list(zip(hashes[i:], blocks[i:], strict=True))
                    self.blocks.remove(row)
                    back.append((row[0], row[1]))
                self.blocks.append([key, block, parent, 0])
            parent = key
        return back

    def reserve(self, hashes, parent):
        """The missing hashes, what was evicted, and the block that stays meanwhile."""
        known = self.chain(hashes)
        missing = hashes[len(known) :]
        tail = known[-1] if known else parent
        if tail is not None:
            self.row(tail)[3] += 1
        excess = 0 if self.cap is None else max(0, self.in_custody() + len(missing) - self.cap)
        try:
            gone = self.evict(excess)
        except TooFew:
            if tail is not None:
                self.row(tail)[3] -= 1
            raise
        self.reserved += len(missing)
        return missing, gone, tail

    def end(self, missing, tail, blocks, is_stale):
        self.reserved -= len(missing)
        is_lost = is_stale or (tail is not None and self.row(tail) is None)
        if blocks is None:
            back = []
        elif is_lost:
            back = list(zip(missing, blocks, strict=True))
        else:
            back = self.insert(missing, blocks, tail)
        return back + (self.unuse(tail) if tail is not None else [])

    def drop(self, hashes):
        gone = []
        for key in hashes:
            if self.row(key) is None:
                continue
            for one in self.below(key):
                row = self.row(one)
                self.blocks.remove(row)
                if row[3]:
                    self.draining.append(row)
                else:
                    gone.append((row[0], row[1]))
        return gone

    def reset(self):
        return self.drop([row[0] for row in self.blocks])
