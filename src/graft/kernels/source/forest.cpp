#include "forest.h"

#include <algorithm>

namespace graft {
namespace {

constexpr int64_t CUT = 32;          // spans are cut after multiples of so many tokens
constexpr int64_t LEAST_WORK = 1 << 14;  // below it, what a piece costs in addition would count

// Positions that `count` tokens from position `first` on see, all together.
int64_t work_of(int64_t first, int64_t count) { return count * first + count * (count + 1) / 2; }

std::vector<Place> places_of(const int64_t* spans, int64_t count) {
  std::vector<Place> places;
  std::vector<int64_t> open;
  for (const int64_t* span = spans; span < spans + 3 * count; span += 3) {
    while (!open.empty() && places[open.back()].subtree_end <= span[0]) open.pop_back();
    Place place = {span[0], span[1], span[2], 0, open.empty() ? -1 : open.back()};
    if (!open.empty()) place.first = places[open.back()].first + places[open.back()].end - places[open.back()].start;
    open.push_back(places.size());
    places.push_back(place);
  }
  return places;
}

}  // namespace

Forest::Forest(const int64_t* spans, int64_t count, int64_t wanted) {
  int64_t total = 0;
  for (const Place& place : places_of(spans, count)) {
    total += work_of(place.first, place.end - place.start);
    longest = std::max(longest, place.first + place.end - place.start);
  }
  const int64_t share = std::max(total / wanted, LEAST_WORK);
  std::vector<int64_t> cut_spans, starts = {0};  // starts of pieces
  int64_t done = 0;
  for (const Place& place : places_of(spans, count)) {
    int64_t start = place.start;
    for (int64_t at = place.start; at < place.end; at += CUT) {
      const int64_t tokens = std::min(CUT, place.end - at), work = work_of(place.first + at - place.start, tokens);
      if (done + work / 2 >= int64_t(starts.size()) * share) {
        if (at > start) cut_spans.insert(cut_spans.end(), {start, at, place.subtree_end});
        start = at;
        starts.push_back(cut_spans.size() / 3);
      }
      done += work;
    }
    cut_spans.insert(cut_spans.end(), {start, place.end, place.subtree_end});
  }
  places = places_of(cut_spans.data(), cut_spans.size() / 3);
  starts.push_back(places.size());
  for (size_t i = 0; i + 1 < starts.size(); ++i)
    if (starts[i] < starts[i + 1]) pieces.push_back({starts[i], starts[i + 1], places[starts[i]].first});
}

std::vector<int64_t> Forest::ancestors(int64_t index) const {
  std::vector<int64_t> above;
  for (int64_t i = places[index].parent; i >= 0; i = places[i].parent) above.push_back(i);
  std::reverse(above.begin(), above.end());
  return above;
}

}  // namespace graft
