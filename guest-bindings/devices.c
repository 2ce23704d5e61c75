/*
 * The guest's side of the manifest: which devices there are.
 * The rule: a handle is good when it was acquired here, under the kind it is used as.
 */
#include "runtime.h"

#include <string.h>

static const struct mft_entry *entries;
static uint32_t count;
static uint64_t acquired; /* bit n: handle n */

void hvt_devices_init(const struct mft_header *manifest)
{
    if (manifest->version != MFT_VERSION || manifest->entries > MFT_MAX_ENTRIES)
        hvt_abort("the manifest that the tender passed is not valid");
    entries = (const struct mft_entry *)(manifest + 1);
    count = manifest->entries;
}

static uint64_t bit(solo5_handle_t handle)
{
    return UINT64_C(1) << handle;
}

const struct mft_entry *hvt_device_acquire(const char *name, uint32_t type, solo5_handle_t *handle)
{
    for (uint32_t i = 1; i < count; i++) { /* entry 0 is reserved */
        const struct mft_entry *entry = &entries[i];
        if (entry->type != type || strncmp(entry->name, name, MFT_NAME_SIZE) != 0)
            continue;
        if (!entry->attached || (acquired & bit(i)))
            return NULL;
        acquired |= bit(i);
        *handle = i;
        return entry;
    }
    return NULL;
}

const struct mft_entry *hvt_device(solo5_handle_t handle, uint32_t type)
{
    if (handle >= count || !(acquired & bit(handle)) || entries[handle].type != type)
        return NULL;
    return &entries[handle];
}
