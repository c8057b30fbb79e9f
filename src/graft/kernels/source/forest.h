// A packed row of trees as the attention of training walks through it.
#pragma once

#include <cstdint>
#include <vector>

namespace graft {

// A span, or a part of one that was cut: a chain of spans sees what the whole span would.
struct Place {
  int64_t start, end, subtree_end;  // in the row
  int64_t first;                    // of the span's positions on its path
  int64_t parent;                   // index; -1: none
};

// Work of its own: the queries of neighbouring places. Their ancestors among earlier places are only looked at.
struct Piece {
  int64_t first, last;  // places
  int64_t shared;       // positions on the path to its first place
};

struct Forest {
  std::vector<Place> places;  // in row order, which is depth first
  std::vector<Piece> pieces;
  int64_t longest = 0;        // positions on a path

  // From spans [count, 3]: start, end, end of the subtree; cut into about `pieces` pieces of about equal work.
  Forest(const int64_t* spans, int64_t count, int64_t pieces);

  // The places above place number `index`, from the root down.
  std::vector<int64_t> ancestors(int64_t index) const;
};

}  // namespace graft
