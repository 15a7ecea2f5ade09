// A policy of the registry world in C: refuses the repositories that the file `images` names, one a line.
//
// With ASKS it asks its machine all that a C library knows, and tells what it was told in the reason of its denial.
#include <stdlib.h>
#include <string.h>

#include "registry_policy.h"

#ifdef ASKS
#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>
#endif

static registry_policy_list_u8_t images;

bool exports_peili_policy_lifecycle_configure(
    registry_policy_string_t *settings, exports_peili_policy_lifecycle_node_t *maybe_here,
    exports_peili_policy_lifecycle_policy_info_t *ret, exports_peili_policy_lifecycle_list_setting_error_t *err) {
  (void)settings;
  (void)maybe_here;
  registry_policy_string_t name;
  registry_policy_string_set(&name, "images");
  if (!peili_policy_data_read(&name, &images)) {
    err->len = 1;
    err->ptr = calloc(1, sizeof *err->ptr);
    registry_policy_string_dup(&err->ptr->pointer, "");
    registry_policy_string_dup(&err->ptr->message, "no file `images` is given");
    return false;
  }
  memset(ret, 0, sizeof *ret);
  registry_policy_string_dup(&ret->summary, "refuses a list, in C");
  return true;
}

static bool is_listed(const registry_policy_string_t *repository) {
  const uint8_t *at = images.ptr, *end = images.ptr + images.len;
  while (at < end) {
    const uint8_t *line = memchr(at, '\n', (size_t)(end - at));
    size_t length = (size_t)((line ? line : end) - at);
    if (length == repository->len && memcmp(at, repository->ptr, length) == 0) return true;
    at += length + 1;
  }
  return false;
}

static const char *told(void) {
#ifdef ASKS
  static char text[200];
  struct timespec since = {7, 7};
  clock_gettime(CLOCK_MONOTONIC, &since);
  unsigned char random[4] = {7, 7, 7, 7};
  int entropy = getentropy(random, sizeof random);
  DIR *root = opendir("/");
  FILE *file = fopen("/etc/hostname", "w");
  int written = printf("a line that nobody reads\n"), flushed = fflush(stdout);
  snprintf(text, sizeof text, "time %lld, since %lld, HOME %s, random %d %d%d%d%d, root %s, file %s, written %d %d",
           (long long)time(NULL), (long long)since.tv_sec, getenv("HOME") ? "set" : "unset", entropy, random[0],
           random[1], random[2], random[3], root ? "open" : "closed", file ? "open" : "closed", written, flushed);
  return text;
#else
  return "it is on the list";
#endif
}

void exports_peili_policy_registry_decide(exports_peili_policy_registry_request_t *request,
                                          exports_peili_policy_registry_verdict_t *ret) {
  memset(ret, 0, sizeof *ret);
  if (is_listed(&request->repository)) {
    ret->decision.tag = EXPORTS_PEILI_POLICY_REGISTRY_DECISION_DENY;
    ret->reason.is_some = true;
    registry_policy_string_dup(&ret->reason.val.code, "listed");
    registry_policy_string_dup(&ret->reason.val.message, told());
  } else {
    ret->decision.tag = EXPORTS_PEILI_POLICY_REGISTRY_DECISION_ABSTAIN;
  }
  exports_peili_policy_registry_request_free(request);
}
