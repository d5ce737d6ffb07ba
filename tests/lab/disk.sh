# What set-up scripts need to make disks. Read by them with `source`, in bash.

# Where the file system of such a disk begins, in bytes.
disk_offset=1048576

# Makes disk image $1 of $2 MiB: a GPT with one partition, and in that an ext4 file system with what is in folder $3.
# No device, no mount and no root is needed; under fakeroot, owners are what fakeroot says.
make_disk() {
    local image=$1 size=$2 folder=$3
    rm -f "$image"
    truncate -s "${size}M" "$image"
    printf '%s\n' 'label: gpt' 'start=1MiB, type=linux' | sfdisk -q "$image"
    # The last MiB has the second copy of the table.
    mke2fs -q -F -t ext4 -b 4096 -E "offset=$disk_offset,root_owner=0:0" -d "$folder" "$image" "$((size - 2))M"
}
