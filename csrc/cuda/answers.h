// What does not change but takes microseconds to ask, such as a device's limits: asked once.
#pragma once

#include <map>
#include <mutex>

namespace pycdgkd {
namespace cuda {

template <class Key, class Value>
class Answers {
 public:
  template <class Ask>
  Value of(const Key& key, const Ask& ask) {
    const std::lock_guard<std::mutex> guard(lock_);
    const auto found = known_.find(key);
    return found != known_.end() ? found->second : known_[key] = ask();
  }

 private:
  std::mutex lock_;
  std::map<Key, Value> known_;
};

}  // namespace cuda
}  // namespace pycdgkd
