#!/bin/sh
# Makes the secrets that docker-compose.yml mounts, each once: a second run changes nothing.
# The folder is closed to others; the files in it are readable, because a container's user, who
# reads its own copy of the mount, is none of this machine's.
set -eu
folder=${1:-$(dirname "$0")/secrets}
mkdir -p "$folder"
chmod 700 "$folder"

secret() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }

for name in redis_password grafana_password; do
    [ -s "$folder/$name" ] || secret >"$folder/$name"
done
# Redis keeps the password's digest alone. The user's rights are those that docs/sessions.md lists;
# without a user a client may ping, which is what the health check does.
digest=$(sha256sum <"$folder/redis_password" | cut -d' ' -f1)
cat >"$folder/redis_acl.new" <<ACL
user default on nopass resetkeys resetchannels -@all +ping
user specinfer on #$digest resetkeys ~specinfer:* resetchannels -@all +ping +hello +auth +info +select +time +scan +eval +evalsha +get +set +del +append +getrange +strlen +exists +pexpire +pttl +hget +hset +hmget +hgetall +hdel +hexists +hstrlen +hincrby +zadd +zrem +zcard +zscore +zrangebyscore +zremrangebyscore +zremrangebyrank +cluster|slots +cluster|shards +cluster|nodes +command +readonly +asking
ACL
mv -f "$folder/redis_acl.new" "$folder/redis_acl"
chmod 444 "$folder"/*
echo "secrets in $folder"
