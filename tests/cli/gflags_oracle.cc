// What real gflags makes of a command line, as one line of JSON: the flags that were set and the words that are left.
// Ends with exit code 1, as gflags does, when it refuses the line. Build: g++ gflags_oracle.cc -lgflags
#include <gflags/gflags.h>

#include <cmath>
#include <cstdio>
#include <string>

DEFINE_bool(flag_off, false, "");
DEFINE_bool(flag_on, true, "");
DEFINE_int32(small, 1, "");
DEFINE_uint32(count, 2, "");
DEFINE_int64(large, 3, "");
DEFINE_double(ratio, 0.5, "");
DEFINE_string(text, "", "");
DEFINE_string(other_text, "", "");

static const char* separator = "";

static std::string Quoted(const std::string& raw) {
  std::string shown = "\"";
  for (unsigned char c : raw) {
    char escaped[8];
    if (c == '"' || c == '\\' || c < 0x20) {
      std::snprintf(escaped, sizeof escaped, "\\u%04x", c);
      shown += escaped;
    } else {
      shown += static_cast<char>(c);
    }
  }
  return shown + "\"";
}

static bool WasSet(const char* name) {
  if (gflags::GetCommandLineFlagInfoOrDie(name).is_default) return false;
  std::printf("%s\"%s\": ", separator, name);
  separator = ", ";
  return true;
}

int main(int argc, char** argv) {
  gflags::ParseCommandLineFlags(&argc, &argv, true);
  std::printf("{\"values\": {");
  if (WasSet("flag_off")) std::printf(FLAGS_flag_off ? "true" : "false");
  if (WasSet("flag_on")) std::printf(FLAGS_flag_on ? "true" : "false");
  if (WasSet("small")) std::printf("%d", FLAGS_small);
  if (WasSet("count")) std::printf("%u", FLAGS_count);
  if (WasSet("large")) std::printf("%lld", static_cast<long long>(FLAGS_large));
  if (WasSet("ratio")) std::printf(std::isfinite(FLAGS_ratio) ? "%.17g" : "\"%g\"", FLAGS_ratio);
  if (WasSet("text")) std::printf("%s", Quoted(FLAGS_text).c_str());
  if (WasSet("other_text")) std::printf("%s", Quoted(FLAGS_other_text).c_str());
  std::printf("}, \"words\": [");
  for (int i = 1; i < argc; ++i) std::printf("%s%s", i > 1 ? ", " : "", Quoted(argv[i]).c_str());
  std::printf("]}\n");
  return 0;
}
